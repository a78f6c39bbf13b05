"""The native engine, its memory plan and the devices it runs on."""
