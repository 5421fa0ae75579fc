"""Tests of hvd_backup. A package, so that every test module has one name, in pytest and in the ranks that it starts."""
