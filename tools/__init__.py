"""What developers, tests and the demo need: a bootstrap, and a real ComfyUI to run against."""
