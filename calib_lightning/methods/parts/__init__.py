"""What a method's file would be too long with: networks and rules of one method each, which it imports."""
