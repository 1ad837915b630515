"""Routing rules: how gates choose experts and weigh them.

The settings take a rule's name, its line in the help and its constraints from here, before torch is needed: so torch is
imported by the functions that compute.
"""
