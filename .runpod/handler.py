"""RunPod's Hub asks for a file of this name. The worker is klein/runpod.py."""

from klein.runpod import main

if __name__ == "__main__":
    main()
