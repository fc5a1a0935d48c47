"""How to compute a KVAE in little memory: feature maps by strips and tiles, and plans of what that takes."""
