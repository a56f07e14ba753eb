"""`python -m swarmoe` is `swarmoe`."""

from swarmoe.cli import main

if __name__ == "__main__":
    main()
