"""The recipe's sections, one file a subject; `launch.config.Recipe` puts them together."""
