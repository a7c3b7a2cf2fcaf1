"""The address of the RunPod worker: `python -m klein.runpod`."""

from klein.entrypoints.runpod import main

if __name__ == "__main__":
    main()
