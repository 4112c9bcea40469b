"""``python -m recbole_gacllm``: the same as ``run_recbole_gacllm.py``."""

from recbole_gacllm.cli.main import main

if __name__ == "__main__":
    main()
