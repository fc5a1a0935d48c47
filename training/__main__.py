"""`python -m training COMMAND …` in a checkout, without installation."""

import sys

from kvae_comfyui.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
