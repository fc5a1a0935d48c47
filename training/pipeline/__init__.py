"""From a folder of videos to two adapters, by one command."""
