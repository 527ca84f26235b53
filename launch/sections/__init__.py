"""The recipe's sections, one file a subject; `polyphony.launch.config.Recipe` puts them together."""
