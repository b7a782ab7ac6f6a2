"""The ``surgeon`` command as a module, for launchers: ``torchrun --nproc-per-node 2 -m llm_surgeon prune ...``."""

from llm_surgeon.cli import main

if __name__ == "__main__":
    main()
