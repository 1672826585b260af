"""Signed and encrypted folders."""
