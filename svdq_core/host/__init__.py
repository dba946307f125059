"""The only place that imports ComfyUI: its model classes stay, their linear layers become ours."""
