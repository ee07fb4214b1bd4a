"""``python -m savl.profile``, which is `savl profile`: the profilers of a GPU start it in this form."""

import sys

from savl.cli import main

if __name__ == "__main__":
    main(["profile", *sys.argv[1:]], until_exit=True)
