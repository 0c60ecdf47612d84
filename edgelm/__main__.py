"""`python -m edgelm`."""

from edgelm.cli import main

if __name__ == "__main__":
    main()
