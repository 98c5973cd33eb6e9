"""`python -m segrl`: print the list of commands."""

import importlib.util
import sys

COMMANDS = {
    "train": "train a policy: python -m segrl.train +experiment=demo",
    "evaluate": "score a policy on benchmarks: python -m segrl.evaluate +suite=NAME model=FOLDER",
    "score": "score a folder of masks against ground truth: python -m segrl.score pred=FOLDER gt=FOLDER",
    "export": "write a trained policy as a Hugging Face folder: python -m segrl.export ckpt=FILE out=FOLDER",
    "prepare": "check a dataset, or write traces from masks: python -m segrl.prepare check data=NAME",
    "track": "add run folders to MLflow: python -m segrl.track RUN ...",
    "chain": "runs that start from each other: python -m segrl.chain FILE --runs FOLDER",
    "serve": (
        "start a vLLM server for a run to sample from: "
        "python -m segrl.serve +experiment=NAME rollout=vllm_server"
    ),
}


def main() -> None:
    """Print the commands. Exit with 2 if there is an argument other than `--help`."""
    print("segrl teaches multimodal language models to segment. Commands (each has --help):\n")
    for name, said in COMMANDS.items():
        if importlib.util.find_spec(f"segrl.{name}") is not None:
            print(f"  segrl.{name:<9} {said}")
    asked = [word for word in sys.argv[1:] if word not in ("--help", "-h")]
    if asked:
        print(f"segrl: must be run as python -m segrl.COMMAND; got {asked[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
