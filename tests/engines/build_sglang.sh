#!/usr/bin/env bash
# Build the SGLang environment of the tests (CPU, no GPU needed), or keep it when nothing it is made of has changed:
#
#     bash tests/engines/build_sglang.sh [FOLDER]        # FOLDER: .venv-sglang beside the repository's files
#
# PYTHON names the interpreter it is made with (python3.11). SGLang's CPU kernels are on no package index: the stand-ins in
# sglang_cpu/ let it run on torch's own.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-.venv-sglang}
python=${PYTHON:-python3.11}
stamp=$venv/.rl_onoff-made-of
made_of=$({ "$python" --version; cat requirements/sglang-cpu.txt requirements/sglang-cpu-nodeps.txt tests/engines/build_sglang.sh; } | sha256sum)

if [ "$(cat "$stamp" 2>/dev/null)" != "$made_of" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r requirements/sglang-cpu.txt
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r requirements/sglang-cpu-nodeps.txt
    echo "$made_of" > "$stamp"
fi

# copied on every call: cheap, and never out of date
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp tests/engines/sglang_cpu/*.py "$packages"
echo 'import rl_onoff_sglang_cpu' > "$packages/rl_onoff_sglang_cpu.pth"
echo "SGLang's environment is ready: $venv/bin/python"
