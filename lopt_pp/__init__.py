"""LoPT-PP: pipeline-parallel post-training by local learning."""
