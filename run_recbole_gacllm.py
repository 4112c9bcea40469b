"""Train and test GaCLLM, or any RecBole model; ``--help`` explains."""

from recbole_gacllm.cli import main

if __name__ == "__main__":
    main()
