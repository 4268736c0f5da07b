"""Cohorts of clients on one device: what they train and score on, in how many passes.

Knows methods, features and data; nothing of rounds, of a server or of a run's folder.
"""

from __future__ import annotations
