"""`python -m cloud_lib`."""

import sys

from cloud_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
