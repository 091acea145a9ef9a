"""Entry point of `python -m sfumato`, for where the program's folder is not on PATH."""

from sfumato.cli.main import main

# processes that a program starts import its main module, under another name
if __name__ == "__main__":
    main()
