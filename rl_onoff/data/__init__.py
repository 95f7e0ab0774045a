"""What a run reads: data files, prompts, and rollouts that trainers wrote."""
