"""`python -m llmops` is the `llmops` command."""

from llmops.cli import main

if __name__ == "__main__":
    main()
