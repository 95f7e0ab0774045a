"""What a sweep's job is called: by the overrides in which it differs from the other jobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from omegaconf import ListConfig, OmegaConf

MAX_FOLDER_NAME = 200  # bytes; a file system takes 255


def job_folder(overrides: Sequence[str], fixed: Sequence[str] = ()) -> str:
    """The name of a job's folder: its overrides but the `fixed` ones, without slashes, cut where it is too long."""
    if isinstance(overrides, ListConfig):  # read item by item it would resolve them, an `${oc.env:HF_TOKEN}` too
        overrides = [str(override) for override in OmegaConf.to_container(overrides) or ()]
    name = re.sub(r"[/\\]+", "_", ",".join(swept(overrides, fixed))) or "job"
    if len(name.encode()) <= MAX_FOLDER_NAME:
        return name
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"{name.encode()[: MAX_FOLDER_NAME - 9].decode(errors='ignore')}-{digest}"


def swept(overrides: Iterable[str], fixed: Iterable[str] = ()) -> list[str]:
    """A job's overrides but those that are the same for all jobs, sorted."""
    names = {*fixed, "run_dir", "sweep_dir"}
    return sorted(override for override in overrides if override.partition("=")[0] not in names)


# When imported, for a launcher's own processes name their jobs' folders, too.
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
