"""``python -m padst_compiler``: the command line."""

from padst_compiler.cli import main

raise SystemExit(main())
