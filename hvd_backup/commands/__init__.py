"""The subcommands of `hvd-backup`, one module each; hvd_backup/cli.py lists them."""
