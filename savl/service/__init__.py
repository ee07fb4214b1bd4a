"""The HTTP service of `savl serve`: images are posted to it, and it returns them upscaled.

`app.py` is the web application, `pool.py` distributes images to worker processes, `worker.py` runs in them, and
`batching.py` lets the images of a worker share passes over the network.
"""
