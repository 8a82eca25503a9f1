"""Where ``mlxq`` and ``python -m mlxq`` start."""


def main() -> None:
    """Run the program. Ctrl-C is quiet even while it is still being imported."""
    try:
        from mlxq.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
