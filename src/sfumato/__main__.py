"""`python -m sfumato`: the program, where its folder is not on PATH."""

from sfumato.cli.main import main

# processes that a program starts import its main module, under another name
if __name__ == "__main__":
    main()
