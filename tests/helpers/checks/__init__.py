"""Checks that tests of several model families share."""
