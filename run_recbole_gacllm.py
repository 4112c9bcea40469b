"""Train and test GaCLLM, or any RecBole model; ``--help`` explains."""

from recbole_gacllm.cli.main import main

if __name__ == "__main__":
    main()
