"""Retrieval: what lies nearest to a query, exactly."""
