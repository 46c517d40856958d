"""One thin script a stage or command: `python -m pipeline.NAME`."""

from cbml.errors import prepare_script

prepare_script()
