"""`python -m graphexec` is the command `graphexec`."""

from graphexec.cli import main

if __name__ == "__main__":
    main()
