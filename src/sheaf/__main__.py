"""``python -m sheaf``, as it is or under torchrun."""

from sheaf.cli import main

if __name__ == "__main__":
    main()
