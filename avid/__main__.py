"""Commands on folders of videos and on runs.

    python -m avid check --data folder --root DIR     what of a data set can be used, and why the rest cannot
    python -m avid prepare SRC DST                    small copies of a folder's videos, which decode fast
    python -m avid pack DATA DST                      a data set in shards, whose reading decodes no video
    python -m avid statistics --out FILE.npz          mean and deviation of each band of a data set's sound
    python -m avid embed --ckpt C DIR --out F.npz     embeddings of your own videos and sounds
    python -m avid search --ckpt C DIR QUERY          which of them are like a video, a picture or a sound
    python -m avid page RUN                           a page to look at, of all that a run folder holds
    python -m avid weights RUN                        weights of true and of faulty pairs of a run on the toy
    python -m avid tasks                              clips as the temporal tasks take them

python -m avid COMMAND --help tells the rest.
"""

import importlib
import sys

# their modules in avid.tools
COMMANDS = {
    "check": "prepare",
    "prepare": "prepare",
    "pack": "pack",
    "statistics": "statistics",
    "embed": "collection",
    "search": "collection",
    "page": "page",
    "weights": "show",
    "tasks": "show",
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        importlib.import_module(f"avid.tools.{COMMANDS[argv[0]]}").main(argv)
        return
    print(
        f"usage: python -m avid {'|'.join(COMMANDS)} …\n\n{__doc__}",
        end="",
        file=sys.stdout if "--help" in argv else sys.stderr,
    )
    if "--help" not in argv and "-h" not in argv:
        asked = (
            f"no command {argv[0]}; there are {', '.join(COMMANDS)}"
            if argv
            else f"name one of {', '.join(COMMANDS)}"
        )
        print(f"error: {asked}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
