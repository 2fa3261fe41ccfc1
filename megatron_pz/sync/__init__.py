"""Weights from any layout to servers, by Hugging Face name, in buckets, by the transport that is asked for."""
