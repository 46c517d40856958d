"""Training: the loop, the device that it runs on, and what an interrupted run continues from."""
