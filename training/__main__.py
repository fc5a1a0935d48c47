"""`python -m training COMMAND …`, from a checkout, with no install."""

import sys

from kvae_comfyui.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
