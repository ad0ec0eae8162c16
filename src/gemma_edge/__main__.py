"""`python -m gemma_edge VERB ...`: the command line, where its script is not on the PATH."""

from gemma_edge.cli.main import main

raise SystemExit(main())
