"""The only place that imports ComfyUI: its model classes stay, their linear layers and FLUX's blocks become ours."""
