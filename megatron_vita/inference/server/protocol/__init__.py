"""Requests and answers of the HTTP interface: fields, limits, media, errors."""
