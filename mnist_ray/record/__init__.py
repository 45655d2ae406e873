"""The record of a run: its files, its header, where its time went."""
