"""The page of `savl web`, on which photographs are upscaled in a browser. It needs gradio (``savl[web]``)."""
