"""Cells computed by Ray on all GPUs of a machine or of a cluster; `dvc repro` takes what they leave."""
