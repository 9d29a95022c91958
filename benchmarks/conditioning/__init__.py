"""The conditioning gap, measured: what filters lose by not seeing the future, and encoders by seeing a part."""
