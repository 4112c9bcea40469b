"""Jobs for a cluster, each one file for an environment of its own; see its first lines."""
