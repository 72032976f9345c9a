"""`python -m avid.figures weights|tasks` is `python -m avid weights|tasks`."""

if __name__ == "__main__":
    from .__main__ import main

    main()
