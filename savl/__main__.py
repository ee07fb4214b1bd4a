"""`python -m savl`, which is what `torchrun -m savl train` starts in every process."""

from savl.cli import main

main()
