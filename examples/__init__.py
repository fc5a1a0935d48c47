"""KVAE in the pipelines of diffusers and in Kandinsky's own code: scripts to run, or to copy from."""
