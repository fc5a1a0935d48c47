"""How to compute a KVAE in little memory: feature maps by strips and tiles, and plans of the memory they need."""
